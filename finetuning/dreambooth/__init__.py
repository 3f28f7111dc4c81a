"""What only DreamBooth has: the subject, the class that is kept, and how both are scored and shown."""
