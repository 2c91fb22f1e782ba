"""Over-the-air update engine for embedded-Linux gateways and the ESP32 chips attached to them."""
