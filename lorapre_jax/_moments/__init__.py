"""How a moment is kept: methods, and what their states hold."""
