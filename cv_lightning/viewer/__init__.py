"""Pages and programs that show runs: report, live view, comparison, data check, playground."""
