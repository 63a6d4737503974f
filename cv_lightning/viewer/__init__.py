"""Pages for people: report, live view, comparison, data check and playground."""
