"""What people read: tables and failures in the terminal, artefacts on disk."""
