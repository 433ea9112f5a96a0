// Run the model of this folder with onnxruntime's C++ interface. Takes token ids.
//
// With ORT as the unpacked folder of an onnxruntime release:
//   c++ -std=c++17 -O2 samples/run.cpp -I ORT/include -L ORT/lib -lonnxruntime -Wl,-rpath,ORT/lib -o run
//   ./run . --tokens 32 15 27 391              the folder, then the ids of a prompt
//   ./run . --precision q4 15 27 391
//
// A causal model goes on with the likeliest tokens. A masked language model prints the likeliest id
// of every position. Which file runs, and what kind of cache it has, stands in config.json.
#include <onnxruntime_cxx_api.h>

#include <algorithm>
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <iterator>
#include <numeric>
#include <regex>
#include <stdexcept>
#include <string>
#include <vector>

using Ids = std::vector<int64_t>;
namespace fs = std::filesystem;

std::string read(const fs::path& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) throw std::runtime_error(path.string() + ": cannot be read");
  return {std::istreambuf_iterator<char>(file), {}};
}

// What stands behind a key of a JSON text, as far as the pattern goes.
std::string value_of(const std::string& json, const std::string& key, const std::string& pattern) {
  std::smatch found;
  if (!std::regex_search(json, found, std::regex("\"" + key + "\"\\s*:\\s*" + pattern))) return "";
  return found[1];
}

Ids numbers(const std::string& text) {
  const std::regex digits("\\d+");
  Ids found;
  for (std::sregex_iterator each(text.begin(), text.end(), digits), end; each != end; ++each)
    found.push_back(std::stoll(each->str()));
  return found;
}

struct Settings {
  std::string file, cache;
  int64_t longest, count;  // tokens seen at once; ids that may be chosen
  Ids end;                 // ids that end a text

  Settings(const fs::path& folder, const std::string& precision) {
    const std::string config = read(folder / "config.json");
    const std::string edge = config.substr(std::min(config.find("\"gptopt_edge\""), config.size()));
    const std::string name = precision.empty() ? "[^\"]+" : precision;
    const std::string facts = value_of(edge, name, "\\{([^{}]*)\\}");  // of the first that fits
    if (facts.empty()) throw std::runtime_error("config.json tells of no file of this precision");
    file = value_of(facts, "file", "\"([^\"]*)\"");
    cache = value_of(facts, "cache", "\"([^\"]*)\"");
    longest = std::stoll(value_of(config, "block_size", "(\\d+)"));
    count = std::stoll(value_of(config, "tokenizer_size", "(\\d+)"));
    end = numbers(value_of(read(folder / "generation_config.json"), "eos_token_id", "(\\d+|\\[[^\\]]*\\])"));
  }
};

// A graph and its cache. A "growing" cache comes back longer from every call. A "shared" or
// "static" one is a buffer for all tokens that will come, read and written in place.
class Model {
 public:
  Model(const fs::path& folder, const Settings& settings, int64_t capacity)
      : session_(environment_, (folder / settings.file).c_str(), Ort::SessionOptions{}),
        in_place_(settings.cache != "growing") {
    Ort::AllocatorWithDefaultOptions allocator;
    for (size_t i = 0; i < session_.GetInputCount(); i++) {
      const std::string name = session_.GetInputNameAllocated(i, allocator).get();
      if (name.rfind("past_key_values", 0) != 0) continue;
      const auto info = session_.GetInputTypeInfo(i);
      const auto tensor = info.GetTensorTypeAndShapeInfo();
      Ids shape = tensor.GetShape();
      shape[0] = 1, shape[2] = in_place_ ? capacity : 0;
      past_names_.push_back(name);
      present_names_.push_back("present" + name.substr(std::string("past_key_values").size()));
      shapes_.push_back(shape), types_.push_back(tensor.GetElementType());
      // Eight bytes hold an element of any type.
      buffers_.emplace_back(shape[1] * std::max<int64_t>(shape[2], 1) * shape[3], 0);
      past_.push_back(cached(past_.size()));
    }
  }

  bool causal() const { return !past_.empty(); }

  // Scores behind ids, `done` tokens being in the cache: T rows of V numbers, the last row last.
  std::vector<std::vector<float>> run(Ids ids, int64_t done) {
    Ids mask(done + ids.size(), 1), positions(ids.size());
    std::iota(positions.begin(), positions.end(), done);
    std::vector<const char*> from{"input_ids", "attention_mask", "position_ids"}, to{"logits"};
    std::vector<Ort::Value> given, out;
    for (Ids* each : {&ids, &mask, &positions}) {
      const int64_t shape[] = {1, int64_t(each->size())};
      given.push_back(Ort::Value::CreateTensor<int64_t>(memory_, each->data(), each->size(), shape, 2));
    }
    out.emplace_back(nullptr);
    for (size_t i = 0; i < past_.size(); i++) {
      from.push_back(past_names_[i].c_str()), to.push_back(present_names_[i].c_str());
      given.push_back(std::move(past_[i]));
      out.push_back(in_place_ ? cached(i) : Ort::Value{nullptr});
    }
    session_.Run(Ort::RunOptions{}, from.data(), given.data(), given.size(), to.data(), out.data(),
                 out.size());
    for (size_t i = 0; i < past_.size(); i++) past_[i] = std::move(out[i + 1]);
    const Ids shape = out[0].GetTensorTypeAndShapeInfo().GetShape();
    const float* scores = out[0].GetTensorData<float>();
    std::vector<std::vector<float>> rows;
    for (int64_t t = 0; t < shape[1]; t++)
      rows.emplace_back(scores + t * shape[2], scores + (t + 1) * shape[2]);
    return rows;
  }

 private:
  Ort::Value cached(size_t i) {
    return Ort::Value::CreateTensor(memory_, buffers_[i].data(), 8 * buffers_[i].size(),
                                    shapes_[i].data(), 4, types_[i]);
  }

  Ort::Env environment_{ORT_LOGGING_LEVEL_ERROR, "sample"};
  Ort::MemoryInfo memory_ = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);
  Ort::Session session_;
  bool in_place_;
  std::vector<std::string> past_names_, present_names_;
  std::vector<Ids> shapes_;
  std::vector<ONNXTensorElementDataType> types_;
  std::vector<std::vector<int64_t>> buffers_;
  std::vector<Ort::Value> past_;
};

// The head may have more rows than there are ids.
int64_t likeliest(const std::vector<float>& scores, int64_t count) {
  return std::max_element(scores.begin(), scores.begin() + count) - scores.begin();
}

int main(int argc, char** argv) try {
  std::string precision;
  int64_t wanted = 32;
  Ids ids;
  for (int i = 2; i < argc; i++) {
    const std::string word = argv[i];
    if (word == "--precision" && i + 1 < argc) precision = argv[++i];
    else if (word == "--tokens" && i + 1 < argc) wanted = std::stoll(argv[++i]);
    else ids.push_back(std::stoll(word));
  }
  if (ids.empty()) throw std::runtime_error("run FOLDER [--precision NAME] [--tokens N] ID...");
  const Settings settings(argv[1], precision);
  for (int64_t id : ids)
    if (id < 0 || id >= settings.count) throw std::runtime_error("a token id is not this model's");
  const int64_t length = ids.size();
  wanted = std::min(wanted, settings.longest - length);
  Model model(argv[1], settings, length + std::max<int64_t>(wanted, 1));
  if (length > settings.longest || (model.causal() && wanted < 1))
    throw std::runtime_error("the prompt is longer than what this model reads");
  auto scores = model.run(ids, 0);
  Ids chosen;
  if (!model.causal())
    for (const auto& row : scores) chosen.push_back(likeliest(row, settings.count));
  while (model.causal()) {
    chosen.push_back(likeliest(scores.back(), settings.count));
    const bool ends = std::count(settings.end.begin(), settings.end.end(), chosen.back()) > 0;
    if (ends || int64_t(chosen.size()) == wanted) break;
    scores = model.run({chosen.back()}, length + chosen.size() - 1);
  }
  for (size_t i = 0; i < chosen.size(); i++) std::cout << (i ? " " : "") << chosen[i];
  std::cout << "\n";
  return 0;
} catch (const std::exception& error) {
  std::cerr << error.what() << "\n";
  return 2;
}
