"""What people look at while a run trains."""
