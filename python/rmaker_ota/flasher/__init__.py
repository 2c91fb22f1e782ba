"""ESP32 chips behind serial ports: which ports there are, and the stubs that speed their flashing up.

The flashing itself is C (``src/csrc/flasher``); targets and commands reach it through `rmaker_ota.ota_core`.
"""
