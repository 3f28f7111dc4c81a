"""What training costs end to end, the trainer beside peers' plain loops."""
