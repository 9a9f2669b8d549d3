// Whole trainings of small networks. A thread takes one network at a time, whose weights, gradients
// and moments stay in its core's cache for all steps.
#pragma once

#include "population_optimizer.h"
#include "population_signals.h"
#include "population_worker.h"

namespace weightops::population {

template <class Number>
struct Job {
  Number* flat;  // of one network, in place
  Number *first, *second;
  Samples<Number> samples;
  const int64_t* batches;     // of its first step; null: all rows
  int64_t batch, next_batch;  // rows, and how far the next step's are
  Number* losses;
  int64_t next_loss;
  double rate;
  Number* found;  // signals of the first step that is recorded
  int64_t next_found;
};

template <class Arithmetic, class Number = typename Arithmetic::Number>
void train(Worker<Arithmetic>& worker, const Job<Number>& job, const Optimizer& optimizer,
           const std::vector<int64_t>& trained, int64_t weights, int64_t first_step, int64_t steps,
           Number* grads, Signals<Arithmetic>* signals = nullptr) {
  Number* found = job.found;
  for (int64_t s = 0; s < steps; ++s) {
    if (signals && signals->record(first_step + s, job.flat, found)) found += job.next_found;
    const bool all = job.batches == nullptr;
    job.losses[s * job.next_loss] =
        worker.loss_grad(job.flat, job.samples, all ? nullptr : job.batches + s * job.next_batch,
                         all ? job.samples.rows : job.batch, weights, grads);
    for (size_t i = 0; i < trained.size(); i += 2) {
      const int64_t at = trained[i], count = trained[i + 1] - at;
      update<Arithmetic>(optimizer, job.rate, first_step + s + 1, count, job.flat + at, grads + at,
                         job.first + at, job.second + at);
    }
    worker.remember(job.flat, first_step + s + 1);
  }
}

}  // namespace weightops::population
