"""What training costs: the trainer timed beside plain loops around peft, and single steps of several models."""
