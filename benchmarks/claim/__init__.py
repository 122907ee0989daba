"""GIFT's claim on real data: a pre-trained encoder, real sentences, few trained numbers."""
