"""Ask a model about a picture and watch it work: one trajectory at a time, in the terminal or a browser."""
