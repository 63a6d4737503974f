"""Where tasks and demonstrations come from: embedded digits, files, and the DataModules that serve them."""
