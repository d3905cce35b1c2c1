"""The whole chain on the small world, from pictures and text to a bundle that answers, each step a command of ours."""
