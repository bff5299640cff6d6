"""Programs compiled for TPUs without one: their schedules, memory and traffic."""
