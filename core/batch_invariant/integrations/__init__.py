"""Thin connections to other libraries, each imported only on use."""
