"""What people read: tables, summaries, progress."""
