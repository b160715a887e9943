"""What each vendor's driver tells of its GPUs; `ftplan.launcher.probe` puts a machine together."""
