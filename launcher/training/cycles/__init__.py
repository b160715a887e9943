"""Methods that change what they train while they train; when they do, `planner.cycles` says."""
