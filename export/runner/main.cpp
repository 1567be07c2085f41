// Generates tokens from a package of rewriter.export.aot_inductor, without Python.
//
//   runner MODEL.pt2 NEW_TOKENS ID [ID ...]
//
// The prompt goes through the entry point `prefill`, each further token through `decode`; both change the tensors of the cache
// in place. What these tensors are is written in the package's metadata, one line for each input: name dtype fill dims.

#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/torch.h>

#include <algorithm>
#include <cstdint>
#include <exception>
#include <filesystem>
#include <iostream>
#include <limits>
#include <map>
#include <memory>
#include <sstream>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <vector>

namespace {

using Loader = torch::inductor::AOTIModelPackageLoader;

struct Input {
  std::string name;
  torch::Dtype dtype;
  std::string fill;  // "-" for arguments
  std::vector<std::string> dims;
};

torch::Dtype dtype_of(const std::string& name) {
  static const std::map<std::string, torch::Dtype> known = {
      {"int64", torch::kInt64},     {"int32", torch::kInt32},       {"bool", torch::kBool},
      {"float32", torch::kFloat32}, {"bfloat16", torch::kBFloat16}, {"float16", torch::kFloat16}};
  const auto found = known.find(name);
  if (found == known.end()) throw std::runtime_error("the package has an input of type " + name + ", which is not known here");
  return found->second;
}

// The entry points of one package.
class Model {
 public:
  explicit Model(const std::string& path) : path_(path) {
    if (!std::filesystem::is_regular_file(path)) throw std::runtime_error(path + " is not a file");
    prefill_ = open("prefill");
    decode_ = open("decode");
    const auto metadata = decode_->get_metadata();
    if (value(metadata, "rewriter_format") != "2")
      throw std::runtime_error(path + " has format " + value(metadata, "rewriter_format") + ", this runner reads 2");
    if (value(metadata, "rewriter_torch") != TORCH_VERSION)
      throw std::runtime_error(path + " was compiled with torch " + value(metadata, "rewriter_torch") + ", this runner with " +
                               TORCH_VERSION);
    vocabulary_ = std::stoll(value(metadata, "rewriter_vocabulary"));
    const std::string most = value(metadata, "rewriter_max_length");
    max_length_ = most == "-" ? std::numeric_limits<int64_t>::max() : std::stoll(most);
    std::istringstream ranges(value(prefill_->get_metadata(), "rewriter_ranges"));
    std::string name;
    for (int64_t low, high; ranges >> name >> low >> high;)
      if (name == "tokens") most_tokens_ = high;
    std::istringstream lines(value(metadata, "rewriter_inputs"));
    for (std::string line; std::getline(lines, line);) {
      std::istringstream words(line);
      std::string input, dtype, fill, dims;
      words >> input >> dtype >> fill >> dims;
      if (fill != "-") state_.push_back(empty(Input{input, dtype_of(dtype), fill, split(dims)}));
      if (input.size() > 5 && input.substr(input.size() - 5) == ".lost") lost_.push_back(state_.size() - 1);
    }
  }

  // The logits after these tokens, [vocabulary].
  torch::Tensor take(const std::vector<int64_t>& tokens) {
    const int64_t count = static_cast<int64_t>(tokens.size());
    for (const int64_t token : tokens)
      if (token < 0 || token >= vocabulary_)
        throw std::runtime_error("token " + std::to_string(token) + " is not from 0 to " + std::to_string(vocabulary_ - 1));
    if (count > most_tokens_ || length_ + count > max_length_)
      throw std::runtime_error(std::to_string(length_ + count) + " tokens do not fit: the package was exported for " +
                               std::to_string(std::min(max_length_, most_tokens_)));
    std::vector<torch::Tensor> inputs = {torch::tensor(tokens, torch::kInt64).view({1, count}),
                                         torch::ones({1, count}, torch::kInt64),
                                         torch::arange(length_, length_ + count, torch::kInt64).view({1, count})};
    if (count > 1) inputs.push_back(torch::full({1}, count - 1, torch::kInt64));
    inputs.insert(inputs.end(), state_.begin(), state_.end());
    const auto outputs = (count > 1 ? prefill_ : decode_)->run(inputs);
    for (const size_t place : lost_)
      if (state_[place].item<int64_t>() > 0) throw std::runtime_error("more keys live at once than the policy promised");
    length_ += count;
    return outputs.at(0).view({-1});
  }

 private:
  std::unique_ptr<Loader> open(const std::string& name) {
    try {
      return std::make_unique<Loader>(path_, name);
    } catch (const std::exception& error) {
      throw std::runtime_error(path_ + " cannot be loaded, or has no entry point " + name +
                               ": it is damaged, or no package of a model with a cache\n" + error.what());
    }
  }

  static std::string value(const std::unordered_map<std::string, std::string>& metadata, const std::string& key) {
    const auto found = metadata.find(key);
    if (found == metadata.end()) throw std::runtime_error("the package says nothing of " + key + "; export the model again");
    return found->second;
  }

  static std::vector<std::string> split(const std::string& dims) {
    std::vector<std::string> parts;
    std::istringstream stream(dims);
    for (std::string part; std::getline(stream, part, ',');) parts.push_back(part);
    return parts;
  }

  static torch::Tensor empty(const Input& input) {
    std::vector<int64_t> sizes;
    for (const auto& dim : input.dims) sizes.push_back(dim == "batch" ? 1 : std::stoll(dim));
    return torch::full(sizes, std::stod(input.fill), input.dtype);
  }

  std::string path_;
  std::unique_ptr<Loader> prefill_, decode_;
  std::vector<torch::Tensor> state_;
  std::vector<size_t> lost_;
  int64_t vocabulary_ = 0, max_length_ = 0, most_tokens_ = 0, length_ = 0;
};

int64_t number(const std::string& text) {
  size_t used = 0;
  int64_t result = 0;
  try {
    result = std::stoll(text, &used);
  } catch (const std::exception&) {
    used = 0;
  }
  if (used == 0 || used != text.size()) throw std::runtime_error("'" + text + "' is not a number");
  return result;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 4) {
    std::cerr << "usage: runner MODEL.pt2 NEW_TOKENS ID [ID ...]\n";
    return 2;
  }
  try {
    const int64_t count = number(argv[2]);
    if (count < 1) throw std::runtime_error("NEW_TOKENS must be at least 1, got " + std::string(argv[2]));
    std::vector<int64_t> tokens;
    for (int i = 3; i < argc; ++i) tokens.push_back(number(argv[i]));
    torch::NoGradGuard no_grad;
    Model model(argv[1]);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t next = model.take(tokens).argmax().item<int64_t>();
      std::cout << next << (i + 1 < count ? " " : "\n");
      tokens = {next};
    }
  } catch (const std::exception& error) {
    std::cerr << "runner: " << error.what() << "\n";
    return 1;
  }
  return 0;
}
