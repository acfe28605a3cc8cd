"""Many runs from one command: configurations by seeds, in this process or in several."""
