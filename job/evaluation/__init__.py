"""What a critic is worth where it is used: to choose among solutions, and to find their errors."""
