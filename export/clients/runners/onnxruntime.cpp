// Greedy tokens with onnxruntime's C++ interface: token ids in, token ids out.
//
// onnxruntime MODEL.onnx THREADS CACHE < CASES > RESULT.json
// CACHE is "static" where it is as long from the start as it will be at the end.
// CASES, words apart: for each case its name (no spaces), "left" or "right", the number of tokens and
// of prompts, and for each prompt its length and its ids.
#include <onnxruntime_cxx_api.h>

#include <algorithm>
#include <cstdint>
#include <iostream>
#include <numeric>
#include <string>
#include <vector>

using Row = std::vector<int64_t>;
using Rows = std::vector<Row>;

struct Answer {
  Rows tokens;
  std::vector<std::vector<float>> logits;
};

struct Tensor {
  Row values;
  Row shape;
  Tensor(const Rows& rows) : shape{int64_t(rows.size()), int64_t(rows[0].size())} {
    for (const Row& row : rows) values.insert(values.end(), row.begin(), row.end());
  }
  Ort::Value view(const Ort::MemoryInfo& memory) {
    return Ort::Value::CreateTensor<int64_t>(memory, values.data(), values.size(), shape.data(), 2);
  }
};

std::vector<std::string> names(const Ort::Session& session, bool inputs) {
  Ort::AllocatorWithDefaultOptions allocator;
  std::vector<std::string> found;
  const size_t count = inputs ? session.GetInputCount() : session.GetOutputCount();
  for (size_t i = 0; i < count; i++)
    found.emplace_back(inputs ? session.GetInputNameAllocated(i, allocator).get()
                              : session.GetOutputNameAllocated(i, allocator).get());
  return found;
}

// For no tokens, of a masked language model: the scores of every position of each prompt, which is
// padded on the right.
Answer generate(Ort::Session& session, const Rows& prompts, bool left, int tokens, bool fixed) {
  const auto memory = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);
  const int64_t B = prompts.size();
  size_t longest = 0;
  for (const Row& prompt : prompts) longest = std::max(longest, prompt.size());
  Rows ids, mask, positions;
  Row last;
  for (const Row& prompt : prompts) {
    const size_t begin = left ? longest - prompt.size() : 0;
    Row id(longest), real(longest), position(longest);
    std::copy(prompt.begin(), prompt.end(), id.begin() + begin);
    std::fill_n(real.begin() + begin, prompt.size(), 1);
    std::partial_sum(real.begin(), real.end(), position.begin());
    for (int64_t& at : position) at = std::max<int64_t>(at - 1, 0);
    ids.push_back(id), mask.push_back(real), positions.push_back(position);
    last.push_back(begin + prompt.size() - 1);
  }
  const auto inputs = names(session, true), outputs = names(session, false);
  std::vector<std::string> past_names;
  Rows zeros;  // eight bytes hold an element of any type
  std::vector<Ort::Value> past;
  for (size_t i = 0; i < inputs.size(); i++) {
    if (inputs[i].rfind("past_key_values", 0) != 0) continue;
    const auto info = session.GetInputTypeInfo(i);
    const auto cache = info.GetTensorTypeAndShapeInfo();
    Row shape = cache.GetShape();
    shape[0] = B, shape[2] = fixed ? longest + tokens : 0;
    zeros.emplace_back(B * shape[1] * std::max<int64_t>(shape[2], 1) * shape[3]);
    past.push_back(Ort::Value::CreateTensor(memory, zeros.back().data(), 8 * zeros.back().size(),
                                            shape.data(), 4, cache.GetElementType()));
    past_names.push_back(inputs[i]);
  }
  Answer answer{Rows(B), {}};
  for (int step = 0; step < std::max(tokens, 1); step++) {
    Tensor id(ids), real(mask), position(positions);
    std::vector<const char*> from{"input_ids", "attention_mask", "position_ids"}, to;
    std::vector<Ort::Value> feed;
    feed.push_back(id.view(memory)), feed.push_back(real.view(memory));
    feed.push_back(position.view(memory));
    for (size_t i = 0; i < past.size(); i++) {
      from.push_back(past_names[i].c_str());
      feed.push_back(std::move(past[i]));
    }
    for (const auto& name : outputs) to.push_back(name.c_str());
    auto out = session.Run(Ort::RunOptions{}, from.data(), feed.data(), feed.size(), to.data(),
                           to.size());
    std::vector<std::pair<std::string, Ort::Value>> present;
    const float* logits = nullptr;
    int64_t T = ids[0].size(), V = 0;
    for (size_t i = 0; i < out.size(); i++) {
      if (outputs[i] != "logits") continue;
      logits = out[i].GetTensorData<float>();
      V = out[i].GetTensorTypeAndShapeInfo().GetShape()[2];
    }
    if (tokens == 0) {
      for (int64_t b = 0; b < B; b++)
        answer.logits.emplace_back(logits + b * T * V, logits + (b * T + last[b] + 1) * V);
      return answer;
    }
    for (int64_t b = 0; b < B; b++) {
      const float* scores = logits + (b * T + last[b]) * V;
      if (step == 0) answer.logits.emplace_back(scores, scores + V);
      const int64_t next = std::max_element(scores, scores + V) - scores;
      answer.tokens[b].push_back(next);
      ids[b] = {next};
      positions[b] = {std::accumulate(mask[b].begin(), mask[b].end(), int64_t{0})};
      mask[b].push_back(1);
      last[b] = 0;
    }
    for (size_t i = 0; i < past_names.size(); i++) {
      const std::string name = "present" + past_names[i].substr(sizeof("past_key_values") - 1);
      past[i] = std::move(out[std::find(outputs.begin(), outputs.end(), name) - outputs.begin()]);
    }
  }
  return answer;
}

template <class T>
void print(const std::vector<std::vector<T>>& rows) {
  for (size_t b = 0; b < rows.size(); b++) {
    std::cout << (b ? "],[" : "[[");
    for (size_t i = 0; i < rows[b].size(); i++) std::cout << (i ? "," : "") << rows[b][i];
  }
  std::cout << "]]";
}

int main(int argc, char** argv) try {
  if (argc != 4) throw std::runtime_error("onnxruntime MODEL.onnx THREADS CACHE < CASES");
  const bool fixed = std::string(argv[3]) == "static";
  Ort::Env environment(ORT_LOGGING_LEVEL_ERROR, "gptopt");
  Ort::SessionOptions options;
  options.SetIntraOpNumThreads(std::stoi(argv[2]));
  Ort::Session session(environment, argv[1], options);
  std::cout.precision(9);
  std::cout << "{\"version\":\"" << OrtGetApiBase()->GetVersionString() << "\",\"cases\":{";
  std::string name, side;
  size_t tokens, count, length;
  for (bool first = true; std::cin >> name >> side >> tokens >> count; first = false) {
    Rows prompts(count);
    for (Row& prompt : prompts) {
      std::cin >> length;
      prompt.resize(length);
      for (int64_t& id : prompt) std::cin >> id;
    }
    const Answer answer = generate(session, prompts, side == "left", tokens, fixed);
    std::replace(name.begin(), name.end(), '_', ' ');
    std::cout << (first ? "" : ",") << "\"" << name << "\":{\"tokens\":";
    print(answer.tokens);
    std::cout << ",\"logits\":";
    print(answer.logits);
    std::cout << "}";
  }
  std::cout << "}}\n";
} catch (const std::exception& error) {
  std::cerr << "Error: " << error.what() << "\n";
  return 1;
}
