"""Many runs: compared fairly, and timed in turns."""
