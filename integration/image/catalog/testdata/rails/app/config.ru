# Copyright The nhybrid Authors.
# SPDX-License-Identifier: Apache-2.0

require 'rails'
require 'action_controller/railtie'

class App < Rails::Application
  config.root = __dir__
  config.eager_load = true
  config.logger = Logger.new($stdout)
  config.hosts.clear if config.respond_to?(:hosts)
  config.secret_key_base = 'for this image alone'
  routes.append { root to: 'hello#index' }
end

class HelloController < ActionController::Base
  def index
    render plain: 'hello from rails'
  end
end

App.initialize!
run App
