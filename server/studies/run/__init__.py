"""Running a study arm by arm."""
