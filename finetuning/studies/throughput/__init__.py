"""What training costs end to end, the trainer beside peers' plain loops; and how steps are timed and told."""
