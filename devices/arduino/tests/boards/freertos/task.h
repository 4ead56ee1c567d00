// Declarations only: see ../README.md.
#pragma once
extern "C" {
void vTaskDelay(uint32_t ticks);
int xTaskCreate(void (*task)(void*), const char* name, uint32_t stack, void* argument,
                unsigned priority, void* handle);
}
