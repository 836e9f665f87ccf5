"""How a moment is kept: the methods, and what their states hold."""
