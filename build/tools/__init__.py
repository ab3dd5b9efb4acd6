"""Commands besides the compile: they tell what it will take, what a scheme costs, and how much memory it needs."""
