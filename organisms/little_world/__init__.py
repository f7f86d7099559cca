"""The little world that the shipped models know: its text, its grammar, the bases trained on it."""
