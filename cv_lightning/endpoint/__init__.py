"""Client of a model behind HTTP, shared by judge, teacher and served policies."""
