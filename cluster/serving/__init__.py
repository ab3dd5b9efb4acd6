"""Ray Serve over the application that serves one box."""
