// A device on this computer: adds events of type `test` and sends them until all are answered.
//
// What it does: the library with a folder as its store and libmosquitto as its transport, and a line
// on stdout for what becomes of each event. What it does not: measure anything.
// Invariant: `kept ID` is written after the event would survive a power cut, and each line at once
// and whole.
#include <errno.h>
#include <mosquitto.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <time.h>
#include <unistd.h>

#include "HomelabTelemetry.h"
#include "homelab/FolderStore.h"
#include "homelab/MosquittoTransport.h"

namespace {

struct Options {
  const char* host = "127.0.0.1";
  int port = 1883;
  const char* device = nullptr;
  const char* store = nullptr;
  unsigned long count = 0;
  unsigned long interval_ms = 1000;
  unsigned long hold_ms = 30000;
  const char* username = nullptr;
  const char* password_file = nullptr;
  const char* cafile = nullptr;
};

homelab::Telemetry<65536, 8192> telemetry;
volatile sig_atomic_t stopping = 0;

void stop(int) { stopping = 1; }

[[noreturn]] void fail(const char* what, const char* why) {
  fprintf(stderr, "telemetry: %s: %s\n", what, why);
  exit(2);
}

unsigned long number(const char* name, const char* text) {
  char* end = nullptr;
  errno = 0;
  const unsigned long value = strtoul(text, &end, 10);
  if (errno != 0 || end == text || *end != '\0' || text[0] == '-' || value > UINT32_MAX) {
    fail(name, "expected a number");
  }
  return value;
}

Options read(int count, char** words) {
  Options options;
  for (int i = 1; i < count; i += 2) {
    const char* const name = words[i];
    if (i + 1 == count) fail(name, "expected a value");
    const char* const value = words[i + 1];
    if (strcmp(name, "--host") == 0) options.host = value;
    else if (strcmp(name, "--port") == 0) options.port = static_cast<int>(number(name, value));
    else if (strcmp(name, "--device") == 0) options.device = value;
    else if (strcmp(name, "--store") == 0) options.store = value;
    else if (strcmp(name, "--count") == 0) options.count = number(name, value);
    else if (strcmp(name, "--interval-ms") == 0) options.interval_ms = number(name, value);
    else if (strcmp(name, "--hold-ms") == 0) options.hold_ms = number(name, value);
    else if (strcmp(name, "--username") == 0) options.username = value;
    else if (strcmp(name, "--password-file") == 0) options.password_file = value;
    else if (strcmp(name, "--cafile") == 0) options.cafile = value;
    else fail(name, "no such option");
  }
  if (options.device == nullptr) fail("--device", "is required");
  if (options.store == nullptr) fail("--store", "is required");
  return options;
}

uint64_t monotonicMs() {
  timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return static_cast<uint64_t>(now.tv_sec) * 1000 + static_cast<uint64_t>(now.tv_nsec) / 1000000;
}

int64_t unixMs() {
  timespec now;
  clock_gettime(CLOCK_REALTIME, &now);
  return static_cast<int64_t>(now.tv_sec) * 1000 + now.tv_nsec / 1000000;
}

// In one write(), so that a kill leaves no half of it.
void print(const char* word, const char* id, const char* reason) {
  char line[512];
  const char* const gap = reason[0] != '\0' ? " " : "";
  const int size = snprintf(line, sizeof line, "%s %s%s%s\n", word, id, gap, reason);
  if (write(STDOUT_FILENO, line, static_cast<size_t>(size)) != size) exit(1);
}

void readPassword(const char* file, char (&into)[1024]) {
  FILE* const opened = fopen(file, "r");
  if (opened == nullptr) fail(file, strerror(errno));
  const bool got = fgets(into, sizeof into, opened) != nullptr;
  fclose(opened);
  if (!got) fail(file, "is empty");
  into[strcspn(into, "\r\n")] = '\0';
}

mosquitto* makeClient(const Options& options, homelab::MosquittoTransport** transport) {
  mosquitto_lib_init();
  mosquitto* const client = mosquitto_new(nullptr, true, transport);
  if (client == nullptr) fail("mosquitto_new", strerror(errno));
  if (options.username != nullptr) {
    char password[1024] = "";
    if (options.password_file != nullptr) readPassword(options.password_file, password);
    mosquitto_username_pw_set(client, options.username, password);
  }
  if (options.cafile != nullptr) {
    const int set = mosquitto_tls_set(client, options.cafile, nullptr, nullptr, nullptr, nullptr);
    if (set != MOSQ_ERR_SUCCESS) fail(options.cafile, mosquitto_strerror(set));
  }
  mosquitto_connect_callback_set(client, [](mosquitto*, void* context, int code) {
    if (code == 0) (*static_cast<homelab::MosquittoTransport**>(context))->onConnect();
  });
  mosquitto_disconnect_callback_set(client, [](mosquitto*, void* context, int) {
    (*static_cast<homelab::MosquittoTransport**>(context))->onDisconnect();
  });
  mosquitto_message_callback_set(client, [](mosquitto*, void*, const mosquitto_message* message) {
    telemetry.onMessage(message->topic, static_cast<const uint8_t*>(message->payload),
                        static_cast<size_t>(message->payloadlen));
  });
  return client;
}

uint32_t randomNumber() {
  uint32_t random = 0;
  if (getrandom(&random, sizeof random, 0) != sizeof random) fail("getrandom", strerror(errno));
  return random;
}

// The connection, if there is one, has some milliseconds.
void serve(mosquitto* client, const Options& options, homelab::Backoff& backoff, bool& tried,
           uint32_t now_ms) {
  const int code = tried ? mosquitto_loop(client, 2, 1) : MOSQ_ERR_NO_CONN;
  if (code == MOSQ_ERR_SUCCESS) return;
  if (backoff.due(now_ms, randomNumber())) {
    tried = mosquitto_connect(client, options.host, options.port, 10) == MOSQ_ERR_SUCCESS;
  } else {
    tried = false;
    poll(nullptr, 0, 2);
  }
}

}  // namespace

int main(int count, char** words) {
  const Options options = read(count, words);
  struct sigaction action;
  memset(&action, 0, sizeof action);
  action.sa_handler = stop;
  sigaction(SIGTERM, &action, nullptr);
  sigaction(SIGINT, &action, nullptr);
  signal(SIGPIPE, SIG_IGN);

  homelab::MosquittoTransport* pointer = nullptr;
  mosquitto* const client = makeClient(options, &pointer);
  homelab::MosquittoTransport transport(client);
  pointer = &transport;
  homelab::FolderStore store(options.store);
  telemetry.hold(static_cast<uint32_t>(options.hold_ms))
      .resend(2000, 30000)
      .filesMax(512)
      .onKept([](const char* id, void*) { print("kept", id, ""); })
      .onStored([](const char* id, void*) { print("stored", id, ""); })
      .onDropped([](const char* id, void*) { print("dropped", id, ""); })
      .onRejected([](const char* id, const char* reason, void*) { print("rejected", id, reason); });
  if (!telemetry.begin(options.device, transport, &store, randomNumber())) {
    fail(options.device, "is no device id");
  }
  if (!telemetry.storeWorks()) fprintf(stderr, "telemetry: %s: no store\n", options.store);

  homelab::Backoff backoff;
  bool tried = false;
  unsigned long added = 0;
  uint64_t due_ms = monotonicMs();
  while (stopping == 0 && (added < options.count || telemetry.waiting() > 0)) {
    const uint64_t now_ms = monotonicMs();
    if (added < options.count && now_ms >= due_ms) {
      const homelab::Value value(static_cast<unsigned long>(++added));
      telemetry.add(static_cast<uint32_t>(now_ms), {"test", value, nullptr, unixMs(), nullptr});
      due_ms += options.interval_ms;
    }
    serve(client, options, backoff, tried, static_cast<uint32_t>(now_ms));
    if (transport.connection() != 0) backoff.succeeded();
    telemetry.loop(static_cast<uint32_t>(now_ms));
  }
  const bool saved = telemetry.save();
  if (!saved) fprintf(stderr, "telemetry: %s: could not save\n", options.store);
  mosquitto_disconnect(client);
  mosquitto_loop(client, 100, 1);  // PUBACK what came last
  mosquitto_destroy(client);
  mosquitto_lib_cleanup();
  return saved ? 0 : 1;
}
