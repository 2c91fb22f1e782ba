# cython: language_level=3
"""The border between the C engine and Python: translates types, errors, buffers and callbacks; decides nothing.

One extension module in several files: each room of ``src/csrc`` that Python reaches has its part under ``src/border``.
"""

include "border/errors.pxi"
include "border/port.pxi"
include "border/esp.pxi"
include "border/nvs.pxi"
include "border/sink.pxi"
include "border/flasher.pxi"
include "border/target.pxi"
include "border/source.pxi"
include "border/engine.pxi"
