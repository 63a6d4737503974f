"""A model behind HTTP: the one client of judge, teacher and served policies."""
