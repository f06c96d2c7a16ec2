"""Build an engine again as its repository says that it was built, and say what differs."""
