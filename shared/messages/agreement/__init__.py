"""What is agreed before anything is spent: the plan of a run, the offer of it, a site's answer."""
