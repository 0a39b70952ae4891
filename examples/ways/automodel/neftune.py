from nemo_automodel.recipes.llm.train_ft import TrainFinetuneRecipeForNextTokenPrediction

from neftune_kernels import apply_neftune


class Recipe(TrainFinetuneRecipeForNextTokenPrediction):
    def setup(self):
        super().setup()
        if self.neftune is not None:  # the recipe's own `neftune: {noise_alpha: 5}`
            model = self.model_parts[0]
            self.neftune.deactivate(model)
            apply_neftune(model, self.neftune.noise_alpha)
