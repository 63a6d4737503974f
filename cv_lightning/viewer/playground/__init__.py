"""The playground: ask a model about an image, and watch, edit, repeat and save its turns."""
