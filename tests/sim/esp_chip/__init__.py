"""A double of an ESP32 chip on a serial port, for flashing tools: `chip`, and ``python -m tests.sim.esp_chip -h``."""

from tests.sim.esp_chip.boot import App, BootedApp, crashing_app, silent_app, usual_app
from tests.sim.esp_chip.chip import Chip, LinkModel, Options
from tests.sim.esp_chip.faults import Fault
from tests.sim.esp_chip.flash import Flash, FlashFaults, FlashTiming
from tests.sim.esp_chip.links import DirectLink, PtyLink, TcpLink
from tests.sim.esp_chip.personas import PERSONAS, Persona

__all__ = (
    "PERSONAS",
    "App",
    "BootedApp",
    "Chip",
    "DirectLink",
    "Fault",
    "Flash",
    "FlashFaults",
    "FlashTiming",
    "LinkModel",
    "Options",
    "Persona",
    "PtyLink",
    "TcpLink",
    "crashing_app",
    "silent_app",
    "usual_app",
)
