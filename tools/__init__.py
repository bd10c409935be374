"""Tools for writing the book."""
