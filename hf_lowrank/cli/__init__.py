"""What only the scripts need."""
