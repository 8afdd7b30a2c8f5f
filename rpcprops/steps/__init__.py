"""Steps of programs: each kind's data, and what a rank does for it."""
