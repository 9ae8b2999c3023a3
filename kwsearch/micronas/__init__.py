"""MicroNAS: convolutional networks over windows of sensors, searched for a microcontroller.

King, Zhou, Röddiger, Beigl, arXiv 2310.18384; Scientific Reports 2025, s41598-025-90764-z.
"""
