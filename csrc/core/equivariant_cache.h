// Plans and programs that were asked for lately: reading one back takes longer than a small layer.
#pragma once

#include <list>
#include <map>
#include <memory>
#include <mutex>
#include <tuple>

#include "equivariant_program.h"

namespace weightops::equivariant {

class Prepared {
 public:
  explicit Prepared(const std::vector<int64_t>& code)
      : code(code), plan(Plan::parse(code.data(), code.size())) {}

  std::shared_ptr<const Program> program(int reads, int64_t channels_read, int64_t channels_written,
                                         int64_t lanes) {
    const std::lock_guard<std::mutex> guard(mutex_);
    auto& found = programs_[{reads, channels_read, channels_written, lanes}];
    if (!found)
      found = std::make_shared<Program>(plan, reads, channels_read, channels_written, lanes);
    return found;
  }

  const std::vector<int64_t> code;
  const Plan plan;

 private:
  std::mutex mutex_;
  std::map<std::tuple<int, int64_t, int64_t, int64_t>, std::shared_ptr<const Program>> programs_;
};

// The plan of these integers, most recently used first.
inline std::shared_ptr<Prepared> prepare(const std::vector<int64_t>& code) {
  constexpr size_t kKept = 32;
  static std::mutex mutex;
  static std::list<std::shared_ptr<Prepared>> recent;
  {
    const std::lock_guard<std::mutex> guard(mutex);
    for (auto it = recent.begin(); it != recent.end(); ++it)
      if ((*it)->code == code) {
        recent.splice(recent.begin(), recent, it);
        return recent.front();
      }
  }
  auto made = std::make_shared<Prepared>(code);
  const std::lock_guard<std::mutex> guard(mutex);
  recent.push_front(made);
  if (recent.size() > kKept) recent.pop_back();
  return made;
}

}  // namespace weightops::equivariant
