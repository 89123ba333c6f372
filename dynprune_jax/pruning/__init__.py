"""The method: what a map attends to, what is kept of it, and what that saves."""
