"""NEFTune noise inside other libraries' models and trainers."""
