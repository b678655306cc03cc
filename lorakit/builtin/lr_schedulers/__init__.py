"""The learning-rate schedules that come with lorakit."""
