"""The trainers' protocol: its messages, and how they are written as JSON or protocol buffers."""
