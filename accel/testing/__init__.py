"""For accel itself and for plugin authors."""
