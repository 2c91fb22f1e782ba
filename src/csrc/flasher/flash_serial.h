/* The flash of a chip behind a serial line as an ota_flash, so that target/esp_target.h works on it.
 *
 * Not for whole images: sink/sink_serial.h streams those. One thread at a time uses a flash and its flasher. */
#ifndef OTA_FLASHER_FLASH_SERIAL_H
#define OTA_FLASHER_FLASH_SERIAL_H

#include "base/status.h"
#include "flasher/flasher.h"
#include "port/port.h"

/* `flasher` is borrowed, outlives the flash, and is connected. Erases and programs are in flash when they return; errors are
 * those of the flasher. ERR_STATE: not connected. ERR_UNSUPPORTED: secure download mode, in which nothing can be read. */
ota_status ota_flash_serial_new(ota_flasher *flasher, ota_flash **out, ota_error *error);

/* The flasher such a flash goes through. */
ota_flasher *ota_flash_serial_flasher(const ota_flash *flash);

/* Forgets everything it knows of the flash's content: somebody else wrote, or the chip was away. */
void ota_flash_serial_forget(ota_flash *flash);

#endif
