"""Worker processes: one backend each, run by programs that the coordinator ships."""
